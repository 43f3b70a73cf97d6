"""The kernel in C++, built and loaded."""
