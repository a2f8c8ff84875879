"""`python -m reason_rl.sandbox [any|namespaces|landlock|all]`: says what holds here; exit status 1 when that is too little."""

import sys

from reason_rl.sandbox.sandbox import require_sandbox

if __name__ == "__main__":
    try:
        print(require_sandbox(*sys.argv[1:2]))
    except ValueError as error:
        sys.exit(f"code sandbox: {error}")
