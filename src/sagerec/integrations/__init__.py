"""SAGE where people already train: TRL, verl, and engines that write completions for us."""
