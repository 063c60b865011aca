"""The gradients that LeapAlign is compared with: a function per method, in two files."""
