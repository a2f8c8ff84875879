"""`python -m reason_rl.sandbox [any|namespaces|landlock|all]`: what holds here? Exit status 1: too little."""

import sys

from reason_rl.sandbox.sandbox import SandboxError, require_sandbox

if __name__ == "__main__":
    try:
        print(require_sandbox(*sys.argv[1:2]))
    except SandboxError as error:
        sys.exit(f"code sandbox: {error}")
