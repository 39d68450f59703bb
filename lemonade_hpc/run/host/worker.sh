#!/bin/sh
# Starts Python inside the image for a worker of one run, whose coordinator has written this. Of its variables a worker
# sees those that are named here, of the host's folders those that are bound, by their own names.
(unset LD_LIBRARY_PATH LD_PRELOAD; apptainer --version) >/dev/null 2>&1 && unset LD_LIBRARY_PATH LD_PRELOAD
for name in $(env | sed -nE 's/^(@kept@)=.*/\1/p'); do
    eval "export APPTAINERENV_$name=\"\$$name\""
done
exec @start@ python3 "$@"
