"""The action space: items -> vectors -> residual codes -> unique Semantic IDs and their trie."""
