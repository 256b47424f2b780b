"""The run folder: its files, what each of them says, and what is wrong with a damaged one."""
