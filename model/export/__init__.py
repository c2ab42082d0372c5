"""Models as graphs for other runtimes: wrapped, written, checked against eager, and run again."""
