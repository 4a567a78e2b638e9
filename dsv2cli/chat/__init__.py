"""Conversations: the turns and their cache, what is kept of them on the disk, and how a person types and reads them."""
