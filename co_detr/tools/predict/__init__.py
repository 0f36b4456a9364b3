"""Running a trained model on images and videos."""
