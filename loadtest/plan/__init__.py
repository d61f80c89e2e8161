"""Plan: what is to be sent, when, to whom; and the command-line options that say it."""
