"""The command line: ``dd-lightning fit | experts | evaluate | report``."""
