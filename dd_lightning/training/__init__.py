"""Training networks by SGD on tensors: experts, live networks and evaluation."""
