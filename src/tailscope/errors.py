"""The one exception for mistakes that a user can mend."""


class UserError(Exception):
    """Bad input. The message is one line that names the file or field and the mend; the command line exits with 2."""
