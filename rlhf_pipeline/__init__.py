"""The InstructGPT recipe as a command line: readable recipes over pure functions over one thin engine."""

__version__ = "0.1.0"
