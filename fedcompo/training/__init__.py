"""What a client computes from its images: task vector, Fisher diagonal, accuracy."""
