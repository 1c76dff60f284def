"""Lists and slates: what a policy shows, decoded exactly through the trie."""
