"""Other tools. Nothing is imported here, as each module needs its tool."""
