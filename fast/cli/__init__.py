"""The `littlebit` command."""
