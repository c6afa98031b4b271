"""Files and folders of other people: what may be written where."""
