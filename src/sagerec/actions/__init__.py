"""Action spaces: what a policy may write. Items as token sequences, their trie, and which continuations are legal."""
