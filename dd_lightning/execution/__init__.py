"""How things are computed: compilation, precision, memory. Never part of a method."""
