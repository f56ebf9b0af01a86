"""What happens beside training: one behaviour a file."""
