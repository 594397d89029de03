"""A server of images and videos: requests in a queue, and ranks that work on one after the other."""
