"""How weights and pictures lie in memory for the kernel."""
