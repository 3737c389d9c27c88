"""The real and the synthetic set: how they are held, initialized, batched and stored."""
