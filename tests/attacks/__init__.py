"""Files that must be refused, built in memory: each with the rule of docs/FORMATS.md that it breaks."""
