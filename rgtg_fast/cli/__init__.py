"""The command line: the app (`main`), and a file for each command with its options and what it prints."""
