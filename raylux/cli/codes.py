"""What the command's exit codes mean."""

EXIT_DONE = 0
EXIT_INTERNAL = 1
EXIT_USER = 2
EXIT_QUARANTINED = 3
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it

EXIT_CODES = """\b
Exit codes:
  0    done
  1    an internal error, or a check that failed
  2    your input cannot be served as it stands: one line says what, where, what to do
  3    finished, but some units are quarantined
  130  interrupted: run the same command again to continue"""
