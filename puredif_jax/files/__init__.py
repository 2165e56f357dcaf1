"""Files that are whole or not there, sealed, and arrays without pickles."""
