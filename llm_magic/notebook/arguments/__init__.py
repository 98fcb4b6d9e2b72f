"""What can be typed behind a magic: the table of options, the parser, help, completion."""


class HelpRequested(Exception):
    """The line of a magic has ``--help``."""
