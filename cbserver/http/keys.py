"""The key that clients must send: what can be one."""


def usable_key(key):
    """The key without white space around it, as files end in a line feed; None stays None.

    Raises ValueError for one that is blank, which would open the server to everybody, or that no
    client could send in a header.
    """
    if key is None:
        return None
    key = key.strip()
    if not key:
        raise ValueError("the API key is empty: give one, or none at all")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ValueError("the API key must be of ASCII letters, digits and signs, without spaces: "
                         "clients cannot send another one in a header")
    return key
