"""Write files atomically, compute digests, find the cache folder, and read untrusted files."""
