#!/usr/bin/env bash
# Lints every chart strictly and compares what it renders, with the values of its ci folder, to the golden file. With
# `rewrite` the goldens are written; read them before you commit. Also checks that the schemas refuse what they should.
set -euo pipefail
cd "$(dirname "$0")"
tool=helm.sh/helm/v4/cmd/helm@v4.3.1
bin=../.tools/helm-v4.3.1
if [ -z "${HELM:-}" ] && [ ! -x "$bin" ]; then
  echo "  building helm (Go module)" >&2
  mkdir -p ../.tools
  GOBIN=$(cd ../.tools && pwd)/helm.new go install "$tool"
  mv ../.tools/helm.new/helm "$bin" && rmdir ../.tools/helm.new
fi
helm=${HELM:-$bin}
fail=0
for c in federation cluster node; do
  "$helm" lint --strict --quiet "$c" -f "$c/ci/values.yaml" || fail=1
  out=$("$helm" template release "$c" --namespace portolan -f "$c/ci/values.yaml")
  if [ "${1:-}" = rewrite ]; then
    mkdir -p golden && printf '%s\n' "$out" >"golden/$c.yaml"
  elif ! diff -u "golden/$c.yaml" <(printf '%s\n' "$out"); then
    echo "charts: $c renders otherwise than golden/$c.yaml (charts/check.sh rewrite, then read it)" >&2
    fail=1
  fi
  if "$helm" template release "$c" -f "$c/ci/values.yaml" --set unknownKey=1 >/dev/null 2>&1; then
    echo "charts: $c accepts a value that it does not know" >&2
    fail=1
  fi
done
exit $fail
