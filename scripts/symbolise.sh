#!/usr/bin/env bash
# Adds function names and source lines to a backtrace on standard input: scripts/symbolise.sh < console.log
exec "$(dirname "$0")/ravelin.sh" symbolise "$@"
