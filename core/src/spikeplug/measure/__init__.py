"""What a converted network costs and where it loses accuracy."""
