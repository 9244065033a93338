#!/bin/sh
# Certificates and keys in /keys/admin, each machine's share of them in a volume of its own, and the
# connection "compose".  What is there stays; `setup.sh --host NAME` makes the server a new
# certificate, with one more name.
set -eu
cd /keys/admin
if [ $# -gt 0 ] || [ ! -e server.pem ]; then
  set -- --host superlink "$@"
fi
flatfed certs . --nodes 3 "$@"
cp -p ca.crt server.pem server.key keys.json ../server/
for i in 0 1 2; do
  cp -p ca.crt "../client-$i/"
  # Once it is with its node, it may be deleted here.
  if [ -e "nodes/$i" ]; then cp -p "nodes/$i" "../client-$i/node.key"; fi
done
mkdir -p "$FLWR_HOME"
cat > "$FLWR_HOME/config.toml" <<END
[superlink]
default = "compose"

[superlink.compose]
address = "superlink:8000"
root-certificates = "/keys/ca.crt"
END
