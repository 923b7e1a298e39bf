#!/usr/bin/env bash
# Fail unless the tag is "v" and the version of the package, and the changelog has a date for it.
set -euo pipefail
cd "$(dirname "$0")/.."
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' sgalign/_version.py)
if [ "$1" != "v$version" ]; then
    echo "the tag must be v$version, as in sgalign/_version.py, got $1" >&2
    exit 1
fi
if ! grep -Eq "^## ${version//./\\.}, [0-9]{4}-[0-9]{2}-[0-9]{2}$" CHANGELOG.md; then
    echo "CHANGELOG.md must have a section '## $version, YYYY-MM-DD'" >&2
    exit 1
fi
