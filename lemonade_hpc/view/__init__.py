"""What people look at: tables, progress, figures, and the commented YAML file to start from."""
