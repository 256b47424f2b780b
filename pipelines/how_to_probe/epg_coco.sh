#!/bin/sh
# EPG on COCO 2014, on images of 448 pixels: how much of each probe's explanations lies in the boxes of the class explained.
#
#   pipelines/how_to_probe/epg_coco.sh CKPT ROOT OUT
#   pipelines/how_to_probe/epg_coco.sh CKPT ROOT OUT --parity how-to-probe
#
# CKPT is a ResNet-50's checkpoint, ROOT holds annotations, train2014 and val2014, and OUT gets the store, the run and the
# page. The second form evaluates as published: 2,001 images, CLIP's statistics, smoothed maps. For a B-cos ResNet-50:
#   GRID=pipelines/how_to_probe/coco14_bcos_resnet50.yaml METHODS=bcos,gradcam,input_x_gradient
set -eu
checkpoint=$1 root=$2 out=$3
shift 3
grid=${GRID:-$(dirname "$0")/coco14_resnet50.yaml}
methods=${METHODS:-lrp,gradcam,input_x_gradient,guided_backprop}
set -- --run "$out/run" "$@"

featcache extract --backbone "$checkpoint" --dataset coco2014 --root "$root" --views 10 --interpolation opencv_bilinear --store "$out/coco14.zarr"
featcache train-probes --grid "$grid" --store "$out/coco14.zarr" "$@"
featcache attribute --select "best map per head,layers" --method "$methods" --score epg,box_iou --backbone "$checkpoint" --dataset coco2014 --root "$root" "$@"
featcache report --run "$out/run" --out "$out/report.html"
