"""Pictures: boxes on images, training curves, and fonts for names in any script."""
