"""What is on the disk to an image list and decoded pixels."""
