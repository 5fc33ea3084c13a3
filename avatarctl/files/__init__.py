"""Files on the disk: formats read and written, folders understood, nothing interpreted."""
