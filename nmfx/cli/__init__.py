"""What the terminal sees: one file a command. Commands parse, call the library, and show the records it returns."""
