"""What trained models do inside: measures over real images, and the report that shows them."""
