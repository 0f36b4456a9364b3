"""A local web page that shows the boxes of a trained model."""
