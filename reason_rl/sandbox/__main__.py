"""`python -m reason_rl.sandbox [any|namespaces|landlock|all]`: prints what holds here; exit status 1 if it is too little."""

import sys

from reason_rl.sandbox.sandbox import SandboxError, require_sandbox

if __name__ == "__main__":
    try:
        print(require_sandbox(*sys.argv[1:2]))
    except SandboxError as error:
        sys.exit(f"code sandbox: {error}")
