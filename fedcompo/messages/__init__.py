"""What clients and server say to each other: records of Flower, requests, fewer bits."""
