#!/bin/sh
# The name run_ppo.sh had in earlier toolkits.
exec sh "$(dirname "$0")/run_ppo.sh" "$@"
