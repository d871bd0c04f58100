"""Filter a corpus and leave out near duplicates with datatrove, for data/text/prepare.py to tokenize.

pip install 'datatrove[io,processing]==0.10.1' spacy      # in an environment of its own
python data/recipes/datatrove_minhash.py --input raw --out clean --tasks 8
python data/text/prepare.py --input 'clean/kept/*.parquet' --dedup exact --out data/mine

Reads the column `text` of all .jsonl (also .gz, .zst) and .parquet files in a folder, each file in one task. Writes the
documents that stay to OUT/kept and the others to OUT/removed, as parquet. Called again, it does the tasks that are not
done.
"""

import argparse

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.readers import JsonlReader, ParquetReader
from datatrove.pipeline.writers import ParquetWriter

# FineWeb's values: of two documents whose sets of 5-grams have a Jaccard similarity of 0.8, one is left out with a
# probability of 0.92.
CONFIG = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="folder of .jsonl and .parquet files")
    parser.add_argument("--out", required=True, help="folder for the results")
    parser.add_argument("--tasks", type=int, default=4, help="parts, each done by a process of its own")
    parser.add_argument("--filters", choices=["gopher", "none"], default="gopher", help="gopher leaves out most code")
    args = parser.parse_args()
    out = args.out

    def run(name, tasks, *steps):
        LocalPipelineExecutor(list(steps), tasks=tasks, logging_dir=f"{out}/logs/{name}").run()

    def removed(step):
        return ParquetWriter(f"{out}/removed/{step}")

    filters = []
    if args.filters == "gopher":
        filters.append(GopherRepetitionFilter(exclusion_writer=removed("repetition")))
        filters.append(GopherQualityFilter(exclusion_writer=removed("quality")))
    rows = JsonlReader(args.input, glob_pattern="**/*.jsonl*")
    tables = ParquetReader(args.input, glob_pattern="**/*.parquet")
    run("filter", args.tasks, rows, tables, *filters, ParquetWriter(f"{out}/filtered"))

    filtered = ParquetReader(f"{out}/filtered")
    run("signatures", args.tasks, filtered, MinhashDedupSignature(f"{out}/signatures", CONFIG))
    run("pairs", CONFIG.num_buckets, MinhashDedupBuckets(f"{out}/signatures", f"{out}/pairs", config=CONFIG))
    run("clusters", 1, MinhashDedupCluster(f"{out}/pairs", f"{out}/clusters", CONFIG))
    near = MinhashDedupFilter(f"{out}/clusters", exclusion_writer=removed("near_duplicates"))
    run("keep", args.tasks, filtered, near, ParquetWriter(f"{out}/kept"))


if __name__ == "__main__":
    main()
