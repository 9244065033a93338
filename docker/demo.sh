#!/bin/sh
# A federation in containers: build, certificates and keys, up, register, run, down.  Nothing of it
# is left but the image and the results.
#
#   docker/demo.sh [key=value ...]        settings of the run
set -eu
[ $# -gt 0 ] || set -- strategy.name=feddc model.norm=group run.rounds=10
cd "$(dirname "$0")/.."
project=flatfed-demo
name=compose-demo-$(date +%Y%m%d-%H%M%S)

fail() {
  echo "error: $1" >&2
  exit 2
}

command -v docker > /dev/null || fail "docker is not installed"
if docker compose version > /dev/null 2>&1; then
  compose="docker compose"
elif command -v docker-compose > /dev/null; then
  compose=docker-compose
else
  fail "neither \`docker compose\` nor docker-compose is installed"
fi
docker info > /dev/null 2>&1 || fail "no Docker engine answers; start one, or set DOCKER_HOST"
compose="$compose -p $project -f docker/compose.yml"
if [ -n "$(docker ps --quiet --filter "label=com.docker.compose.project=$project")" ]; then
  fail "a demo is running already; wait for it, or end it: $compose down --volumes"
fi

child=
# In the background, so that a signal is heeded at once.
step() {
  "$@" &
  child=$!
  wait "$child"
  child=
}

finish() {
  code=$?
  trap '' INT TERM
  trap - EXIT
  if [ -n "$child" ]; then
    kill "$child" 2> /dev/null || :
    wait "$child" || :
  fi
  case $code in 0 | 130 | 143) ;; *) $compose logs --no-color --tail 20 ;; esac
  echo "down"
  $compose down --volumes --remove-orphans --timeout 20 > /dev/null 2>&1 ||
    echo "error: something may be left; end it: $compose down --volumes --remove-orphans" >&2
  exit "$code"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

echo "build"
step docker build --network "${FLATFED_BUILD_NETWORK:-host}" \
  --build-arg PIP_INDEX_URL --build-arg PIP_EXTRA_INDEX_URL \
  --file docker/Dockerfile --tag flatfed:cpu .
echo "up: certificates, keys, SuperLink, registration, three clients"
step $compose up --detach
echo "run"
step $compose run -T --no-deps --rm run run.name="$name" "$@"
mkdir -p results
step docker cp "$($compose ps -q superlink):/results/$name" results/
echo "results: $PWD/results/$name"
