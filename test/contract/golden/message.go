package golden

import (
	"bytes"
	"encoding/json"
	"strings"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
)

func decodeMessage(raw []byte) (proto.Message, error) {
	var fields map[string]any
	decoder := json.NewDecoder(bytes.NewReader(raw))
	decoder.UseNumber()
	if err := decoder.Decode(&fields); err != nil {
		return nil, err
	}
	url, _ := fields["@type"].(string)
	delete(fields, "@type")
	kind, err := protoregistry.GlobalTypes.FindMessageByName(protoreflect.FullName(strings.TrimPrefix(url, "type.googleapis.com/")))
	if err != nil {
		return nil, err
	}
	rest, err := json.Marshal(fields)
	if err != nil {
		return nil, err
	}
	m := kind.New().Interface()
	return m, protojson.Unmarshal(rest, m)
}

// Marshal writes a file's content, for tools that hand resources from one program to another.
func (f File) Marshal() ([]byte, error) { return f.encode() }
