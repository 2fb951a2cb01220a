"""Other tools. Nothing is imported here: each module needs its own tool."""
