// A log folder (C2SP tlog-tiles) by the code that `go` itself checks sum.golang.org with:
//
//	independent_log LOG KEY.pem[,KEY.pem…] [EARLIER…]
//
// EARLIER: SIZE:ROOT (base64) of a head that was seen before. Leaves with 0 when the head's note is signed by
// a key, the tiles lead to its root, each record is in the tree and each earlier head is a prefix of it; with 1,
// and why, when not.
package main

import (
	"crypto/ed25519"
	"encoding/binary"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

const height = 8

// spki is what stands before an Ed25519 key in its SubjectPublicKeyInfo (RFC 8410).
const spki = "\x30\x2a\x30\x05\x06\x03\x2b\x65\x70\x03\x21\x00"

// tiles reads hash tiles of 256. The paths of tlog-tiles are those of sum.golang.org without the height.
type tiles struct{ folder string }

func (t tiles) Height() int { return height }

func (t tiles) path(tile tlog.Tile, kind string) string {
	path := strings.TrimPrefix(tile.Path(), fmt.Sprintf("tile/%d/", height))
	if kind != "" {
		_, path, _ = strings.Cut(path, "/")
		path = kind + "/" + path
	}
	return filepath.Join(t.folder, "tile", path)
}

func (t tiles) ReadTiles(wanted []tlog.Tile) ([][]byte, error) {
	found := make([][]byte, len(wanted))
	for i, tile := range wanted {
		data, err := os.ReadFile(t.path(tile, ""))
		if err != nil {
			return nil, err
		}
		if len(data) != tile.W*tlog.HashSize {
			return nil, fmt.Errorf("%s: %d bytes for %d hashes", tile.Path(), len(data), tile.W)
		}
		found[i] = data
	}
	return found, nil
}

func (t tiles) SaveTiles([]tlog.Tile, [][]byte) {}

// records of the entries files: each after its length as two big-endian bytes.
func (t tiles) records(size int64) ([][]byte, error) {
	var found [][]byte
	for first := int64(0); first < size; first += 1 << height {
		width := size - first
		if width > 1<<height {
			width = 1 << height
		}
		path := t.path(tlog.Tile{H: height, L: 0, N: first >> height, W: int(width)}, "entries")
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		for ; width > 0; width-- {
			if len(data) < 2 || len(data) < 2+int(binary.BigEndian.Uint16(data)) {
				return nil, fmt.Errorf("%s: fewer records than the head says", path)
			}
			end := 2 + int(binary.BigEndian.Uint16(data))
			found, data = append(found, data[2:end]), data[end:]
		}
		if len(data) != 0 {
			return nil, fmt.Errorf("%s: more records than the head says", path)
		}
	}
	return found, nil
}

// verifiers of the notes that the keys sign under a name.
func verifiers(name string, files []string) (note.Verifiers, error) {
	var list []note.Verifier
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		block, _ := pem.Decode(data)
		if block == nil {
			return nil, fmt.Errorf("%s: no PEM", file)
		}
		if len(block.Bytes) != len(spki)+ed25519.PublicKeySize || string(block.Bytes[:len(spki)]) != spki {
			return nil, fmt.Errorf("%s: no Ed25519 key", file)
		}
		public := ed25519.PublicKey(block.Bytes[len(spki):])
		encoded, err := note.NewEd25519VerifierKey(name, public)
		if err != nil {
			return nil, err
		}
		verifier, err := note.NewVerifier(encoded)
		if err != nil {
			return nil, err
		}
		list = append(list, verifier)
	}
	return note.VerifierList(list...), nil
}

// head that a key has signed. ParseTree knows one name alone, which takes the place of the log's.
func head(folder string, keys []string) (tlog.Tree, error) {
	data, err := os.ReadFile(filepath.Join(folder, "checkpoint"))
	if err != nil {
		return tlog.Tree{}, err
	}
	name, _, _ := strings.Cut(string(data), "\n")
	known, err := verifiers(name, keys)
	if err != nil {
		return tlog.Tree{}, err
	}
	opened, err := note.Open(data, known)
	if err != nil {
		return tlog.Tree{}, err
	}
	_, rest, _ := strings.Cut(opened.Text, "\n")
	return tlog.ParseTree([]byte("go.sum database tree\n" + rest))
}

// prefix that the head EARLIER claims.
func prefix(earlier string) (tlog.Tree, error) {
	size, root, _ := strings.Cut(earlier, ":")
	number, err := strconv.ParseInt(size, 10, 64)
	if err != nil {
		return tlog.Tree{}, err
	}
	hash, err := tlog.ParseHash(root)
	return tlog.Tree{N: number, Hash: hash}, err
}

func verify(folder string, keys, earlier []string) error {
	tree, err := head(folder, keys)
	if err != nil {
		return fmt.Errorf("head: %w", err)
	}
	reader := tiles{folder}
	records, err := reader.records(tree.N)
	if err != nil {
		return fmt.Errorf("records: %w", err)
	}
	hashes := tlog.TileHashReader(tree, reader)
	for i, record := range records {
		proof, err := tlog.ProveRecord(tree.N, int64(i), hashes)
		if err != nil {
			return fmt.Errorf("tiles: %w", err)
		}
		if err := tlog.CheckRecord(proof, tree.N, tree.Hash, int64(i), tlog.RecordHash(record)); err != nil {
			return fmt.Errorf("record %d: %w", i, err)
		}
	}
	for _, each := range earlier {
		old, err := prefix(each)
		if err != nil {
			return fmt.Errorf("earlier head: %w", err)
		}
		if old.N > tree.N {
			return fmt.Errorf("earlier head: had %d records, now there are %d", old.N, tree.N)
		}
		proof, err := tlog.ProveTree(tree.N, old.N, hashes)
		if err != nil {
			return fmt.Errorf("tiles: %w", err)
		}
		if err := tlog.CheckTree(proof, tree.N, tree.Hash, old.N, old.Hash); err != nil {
			return fmt.Errorf("earlier head of %d records: %w", old.N, err)
		}
	}
	fmt.Printf("%d records, %d earlier heads\n", tree.N, len(earlier))
	return nil
}

func main() {
	if err := verify(os.Args[1], strings.Split(os.Args[2], ","), os.Args[3:]); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}
